"""What a run is at: its progress, its checkpoints, its disk, and what is wrong with it."""
