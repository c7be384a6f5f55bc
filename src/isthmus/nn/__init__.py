"""Building blocks that know torch and nothing above: attention, towers, losses, connectors, splice."""
