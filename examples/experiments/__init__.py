"""The experiments of the Mixout paper (Lee, Cho & Kang, ICLR 2020), at the scale of two cores."""
