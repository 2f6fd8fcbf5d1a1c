"""Which engine a run takes: the fastest of those that prove themselves on its own first batch."""
