"""Speed and memory of the compiled programs: what `launch.benchmark` prints."""
