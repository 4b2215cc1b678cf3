"""Where arrays live: today the dispatch of tokens to experts, on one device."""
