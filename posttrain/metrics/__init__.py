"""What is measured: comparisons, report cards, charts and trackers."""
