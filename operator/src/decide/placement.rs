//! Which worker should hold which experts.
