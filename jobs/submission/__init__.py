"""Jobs that a cluster runs by itself: submit, status, logs, cancel."""
