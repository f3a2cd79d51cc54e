"""Random calls of every public function, checked against float64; see docs/reliability.md."""
