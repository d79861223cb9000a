"""From rows and axes to chunks of samples, by arithmetic."""
