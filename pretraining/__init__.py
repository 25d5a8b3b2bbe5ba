"""Pre-training by span corruption."""
