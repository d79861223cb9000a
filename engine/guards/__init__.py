"""What every picture goes through: a safety checker and the invisible watermark."""
