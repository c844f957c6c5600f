"""Whether live bars still look as those of training did."""
