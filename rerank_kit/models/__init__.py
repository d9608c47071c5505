"""What a checkpoint is: its files, its family (profile), its prompt, its length limit, the reference for its scores."""
