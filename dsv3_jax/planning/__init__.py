"""What a training run needs and how fast it can be, before a device is booked."""
