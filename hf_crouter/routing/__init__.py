"""From residuals to decisions."""
