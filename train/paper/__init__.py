"""The paper (Alonso et al., ICCV 2021): its rows, their settings and numbers, its figures."""
