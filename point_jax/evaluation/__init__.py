"""What features are worth: scores, probes, votes, and the tables that tell it."""
