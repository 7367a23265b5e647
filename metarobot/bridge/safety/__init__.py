"""What keeps a robot safe: the gate, the limits, the guard process and the emergency stop."""
