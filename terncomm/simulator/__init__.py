"""What a codec costs in accuracy and saves in bytes and time, on links and worlds that are not there."""
