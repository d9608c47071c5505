"""One service from start to stop. start_rerank.sh calls these modules to start, watch, explain and check it."""
