"""One device: the session that trials share, the loop over its slots, one trial's files, single runs."""
