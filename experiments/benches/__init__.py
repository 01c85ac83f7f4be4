"""What the library costs beside the bare computation, paired in one run."""
