"""A text for the demonstration."""

# No 8 bytes occur twice in it, so 8 bytes tell how it goes on.
WORDS = b"the cat sat on the mat, and a dog ran over some log; then it rained.\n"
TEXT = (WORDS * 60)[:3001]
