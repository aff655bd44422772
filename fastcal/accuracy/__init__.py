"""The accuracy of INT8 at a network's outputs: their parts, their noise, and metrics of what users see."""
