"""What tests share beside their fixtures: running `tutor`, builds that are made once a run."""
