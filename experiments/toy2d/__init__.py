"""Learn a distribution in the plane and measure how far the model is from it, exactly."""
