//! What the tests share: starting processes, reading goldens, speaking HTTP.
