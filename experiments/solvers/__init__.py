"""Compare every sampler: orders against the exact flow, quality on trained digits."""
