"""Files of other formats as tutor's rows: which file it is, what a row of it means, and why a row is not usable."""
