"""One service from start to stop: started, watched, explained, checked. start_rerank.sh calls these modules."""
