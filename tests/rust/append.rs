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
/// More than a whole number of blocks.
const CAPACITY: usize = 5 * BLOCK + 3;

fn best() -> Level {
    *Level::available().last().expect("the portable level is always there")
}

/// A cache of two sequences, poisoned with NaN.
struct Cache<E: Number> {
    tokens: Stored<E>,
    means: Stored<E::Compute>,
    lengths: [usize; 2],
}

impl<E: Number> Cache<E> {
    fn new() -> Self {
        Self {
            tokens: Stored::unset((2, HEADS, CAPACITY, CHANNELS), Layout::Contiguous),
            means: Stored::unset((2, HEADS, CAPACITY.div_ceil(BLOCK), CHANNELS), Layout::TokensFirst),
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
        let (mut tokens, mut means) = (self.tokens.tensor_mut("stored"), self.means.tensor_mut("means"));
        append(&new.tensor("new"), &mut tokens, &mut means, &self.lengths, &after, BLOCK, threads, best())?;
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
            let (tokens, means) = (s![item, .., ..length, ..], s![item, .., ..length / BLOCK, ..]);
            assert!(bits(pieces.tokens.read().slice(tokens)) == bits(rounded.slice(tokens)), "{}: tokens", E::NAME);
            assert!(bits(pieces.means.read().slice(means)) == bits(whole.means.read().slice(means)), "{}: means", E::NAME);
            let (means, behind) = (pieces.means.read(), s![item, .., length / BLOCK.., ..]);
            assert!(
                means.slice(behind).iter().all(|mean| mean.exact().is_nan()),
                "{}: no mean of a block that is not complete",
                E::NAME
            );
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
    for block in 0..CAPACITY / BLOCK {
        let tokens = numbers.slice(s![0, .., block * BLOCK..(block + 1) * BLOCK, ..]);
        // Sums of small integers are exact, and so is a division by a power of two.
        let expected = tokens.mean_axis(ndarray::Axis(1)).expect("a block of tokens");
        assert_eq!(cache.means.read().slice(s![0, .., block, ..]), expected);
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
    let (mut tokens, mut means) = (cache.tokens.tensor_mut("stored"), cache.means.tensor_mut("means"));
    for (before, after) in [(&[0, 2][..], &[1, 1][..]), (&[0], &[1]), (&[0, 0], &[1])] {
        assert!(
            append(&new.tensor("new"), &mut tokens, &mut means, before, after, BLOCK, 1, best()).is_err(),
            "{before:?} {after:?}"
        );
    }
    for block_size in [0, Problem::MAX_BLOCK + 1, 2 * BLOCK] {
        let outcome = append(&new.tensor("new"), &mut tokens, &mut means, &[0, 0], &[1, 1], block_size, 1, best());
        assert!(outcome.is_err(), "block size {block_size}");
    }
    let mut apart = Stored::<f32>::unset((2, HEADS, CAPACITY, CHANNELS), Layout::TokensFirst);
    let outcome = append(&new.tensor("new"), &mut apart.tensor_mut("stored"), &mut means, &[0, 0], &[1, 1], BLOCK, 1, best());
    assert!(outcome.expect_err("gaps").to_string().starts_with("stored: stride"), "tokens with other heads between them");
}
