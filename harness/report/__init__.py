"""What a run looks like: text for people, JSON for machines."""
