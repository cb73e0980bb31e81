"""Token sets, statistics and the stream that gathers them with one block in memory."""
