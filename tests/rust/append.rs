//! Stored tokens and their means do not depend on how a sequence was cut into pieces.

use half::bf16;
use mra_attention::{Error, Level, Problem, append};
use ndarray::{Array4, s};
use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use crate::support::{Layout, Number, Rounded, Stored, bits};

const HEADS: usize = 3;
const CHANNELS: usize = 13;
const BLOCK: usize = 8;
/// The sizes of the blocks of every level.
const SIZES: [usize; 2] = [2 * BLOCK, BLOCK];
/// More than a whole number of blocks.
const CAPACITY: usize = 5 * BLOCK + 3;

fn best() -> Level {
    *Level::available().last().expect("the portable level is always there")
}

/// A cache of two sequences, poisoned with NaN.
struct Cache<E: Number> {
    tokens: Stored<E>,
    means: [Stored<E::Compute>; 2],
    lengths: [usize; 2],
}

impl<E: Number> Cache<E> {
    fn new() -> Self {
        Self {
            tokens: Stored::unset((2, HEADS, CAPACITY, CHANNELS), Layout::Contiguous),
            means: SIZES.map(|size| Stored::unset((2, HEADS, CAPACITY.div_ceil(size), CHANNELS), Layout::TokensFirst)),
            lengths: [0; 2],
        }
    }

    /// Appends so many tokens of each sequence, after which there is padding.
    fn append(&mut self, numbers: &Array4<f64>, counts: [usize; 2], threads: usize) -> Result<(), Error> {
        let longest = counts[0].max(counts[1]) + 1;
        let mut new = Array4::from_elem((2, HEADS, longest, CHANNELS), f64::NAN);
        for (item, (count, length)) in counts.into_iter().zip(self.lengths).enumerate() {
            let end = (length + count).min(CAPACITY);
            new.slice_mut(s![item, .., ..end - length, ..]).assign(&numbers.slice(s![item, .., length..end, ..]));
        }
        let (new, after) = (Stored::<E>::new(new.view(), Layout::TokensFirst), [0, 1].map(|i| self.lengths[i] + counts[i]));
        let mut means: Vec<_> = self.means.iter_mut().map(|means| means.tensor_mut("means")).collect();
        let mut tokens = self.tokens.tensor_mut("stored");
        append(&new.tensor("new"), &mut tokens, &mut means, &self.lengths, &after, &SIZES, threads, best())?;
        self.lengths = after;
        Ok(())
    }
}

fn in_pieces<E: Number>() {
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[11; 32]);
    let numbers = Array4::from_shape_fn((2, HEADS, CAPACITY, CHANNELS), |_| rng.random_range(-2.0..2.0));
    let rounded = Stored::<E>::new(numbers.view(), Layout::Contiguous).read();
    let lengths = [CAPACITY, 2 * BLOCK];
    let mut whole = Cache::<E>::new();
    whole.append(&numbers, lengths, 1).expect("lengths that fit");
    for threads in [1, 2, 3] {
        let mut pieces = Cache::<E>::new();
        while pieces.lengths != lengths {
            let counts = [0, 1].map(|item| rng.random_range(0..=lengths[item] - pieces.lengths[item]).min(BLOCK + 3));
            pieces.append(&numbers, counts, threads).expect("lengths that fit");
        }
        for (item, length) in lengths.into_iter().enumerate() {
            let tokens = s![item, .., ..length, ..];
            assert!(bits(pieces.tokens.read().slice(tokens)) == bits(rounded.slice(tokens)), "{}: tokens", E::NAME);
            for (size, (pieces, whole)) in SIZES.into_iter().zip(pieces.means.iter().zip(&whole.means)) {
                let (complete, behind) = (s![item, .., ..length / size, ..], s![item, .., length / size.., ..]);
                let (means, whole) = (pieces.read(), whole.read());
                assert!(bits(means.slice(complete)) == bits(whole.slice(complete)), "{}: means of {size}", E::NAME);
                assert!(
                    means.slice(behind).iter().all(|mean| mean.exact().is_nan()),
                    "{}: no mean of a block of {size} that is not complete",
                    E::NAME
                );
            }
        }
    }
}

#[test]
fn pieces_of_any_length_give_the_same_bits() {
    in_pieces::<f32>();
    in_pieces::<f64>();
    in_pieces::<bf16>();
}

#[test]
fn means_are_means() {
    let numbers = Array4::from_shape_fn((2, HEADS, CAPACITY, CHANNELS), |(b, h, l, d)| (b + 2 * h + 3 * l + 5 * d) as f64);
    let mut cache = Cache::<f64>::new();
    cache.append(&numbers, [CAPACITY, 0], 1).expect("lengths that fit");
    for (size, means) in SIZES.into_iter().zip(&cache.means) {
        for block in 0..CAPACITY / size {
            let tokens = numbers.slice(s![0, .., block * size..(block + 1) * size, ..]);
            // Sums of small integers are exact, and so is a division by a power of two.
            let expected = tokens.mean_axis(ndarray::Axis(1)).expect("a block of tokens");
            assert_eq!(means.read().slice(s![0, .., block, ..]), expected);
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let numbers = Array4::zeros((2, HEADS, CAPACITY, CHANNELS));
    let mut cache = Cache::<f32>::new();
    let refused = cache.append(&numbers, [CAPACITY + 1, 0], 1).expect_err("no room").to_string();
    assert!(refused.starts_with("before: [0, 0] and after: [44, 0], expected 2 lengths"), "{refused}");
    assert!(cache.tokens.read().iter().all(|x| x.is_nan()), "nothing is written");
    let new = Stored::<f32>::new(numbers.view(), Layout::Contiguous);
    let (mut tokens, mut means) = (cache.tokens.tensor_mut("stored"), cache.means[1].tensor_mut("means"));
    for (before, after) in [(&[0, 2][..], &[1, 1][..]), (&[0], &[1]), (&[0, 0], &[1])] {
        assert!(
            append(&new.tensor("new"), &mut tokens, std::slice::from_mut(&mut means), before, after, &[BLOCK], 1, best())
                .is_err(),
            "{before:?} {after:?}"
        );
    }
    for sizes in [&[][..], &[0], &[Problem::MAX_BLOCK + 1], &[2 * BLOCK], &[2 * BLOCK, BLOCK], &[BLOCK, 2 * BLOCK]] {
        let outcome =
            append(&new.tensor("new"), &mut tokens, std::slice::from_mut(&mut means), &[0, 0], &[1, 1], sizes, 1, best());
        assert!(outcome.is_err(), "block sizes {sizes:?}");
    }
    let mut apart = Stored::<f32>::unset((2, HEADS, CAPACITY, CHANNELS), Layout::TokensFirst);
    let (mut apart, means) = (apart.tensor_mut("stored"), std::slice::from_mut(&mut means));
    let outcome = append(&new.tensor("new"), &mut apart, means, &[0, 0], &[1, 1], &[BLOCK], 1, best());
    assert!(outcome.expect_err("gaps").to_string().starts_with("stored: stride"), "tokens with other heads between them");
}
