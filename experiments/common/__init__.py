"""What the commands share: options, devices, optimization, names, tables."""
