"""Training: state, update, parallel modes, checkpoints and the loop."""
