"""What a checkpoint is: its files, its family (profile), its prompt, what fits, and the reference that proves its scores."""
