"""What is kept between replies: a conversation's prompt cache, and the prefixes requests share."""
