"""What every picture passes: the safety checker, and the invisible watermark."""
