"""The parts of `siamese_jax.ranking`: what is exact, what is bounded, and how they are combined.

sources   rows of arrays, memory maps, device arrays and lists of them, as one gallery
exact     the distance of one pair, correctly rounded, and the order of the answers
bounds    the cheap score of all pairs, with a proven interval around the true one
scan      which pairs can be among the answers, in bounded memory
sharded   the same on accelerators, and with the gallery split over several devices
ann       approximate search by other libraries
"""
