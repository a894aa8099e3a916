"""What every other folder may import: errors, bounds of numbers, files, exit codes, registries."""
