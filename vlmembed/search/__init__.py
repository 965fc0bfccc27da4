"""From an exported folder to an encoded corpus, and from a query to what it finds there."""
