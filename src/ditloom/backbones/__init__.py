"""Published trunks, one family a file, composed of parts."""
