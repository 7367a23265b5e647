"""Robot models, their actuators and sensors, and the control of an arm."""
