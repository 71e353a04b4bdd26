//! netfront against netback.
