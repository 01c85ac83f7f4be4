"""Published weights on command lines: opened, conditioned, guided, and made to sample and edit."""
