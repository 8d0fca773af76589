"""From values to what a person reads: table, Markdown, JSON, HTML."""
