//! The exact blocks of a range of queries on tiles.

use std::ops::Range;

use half::bf16;

use super::coarse::State;
use super::exact::{Chosen, ExactBlock, ends, reader};
use super::key_block::{Keys, RangeOfHead};
use super::tmul_keys::QUERIES;
use crate::kernels::{Matrix, Stream, Visible, all_finite};
use crate::mra::attend::KeySource;
use crate::simd::{Element, Scalar};

impl<T: Scalar> ExactBlock<T> {
    /// Continues the softmax of the queries that compute a block: those that see part of it, and those that see all of it. The keys of
    /// the block come with what dropout calls them.
    pub(super) fn attend_on_tiles<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, T>,
        chosen: &Chosen<'_>,
        source: &KeySource<'_, E>,
        (numbers, names): (&Range<usize>, &[u32]),
        [partly, wholly]: [&[u32]; 2],
        state: &mut State<T>,
    ) {
        #[allow(clippy::cast_possible_truncation, reason = "tokens have 32 bits where there are tiles")]
        let tokens: Vec<u32> = numbers.clone().map(|number| source.token(number) as u32).collect();
        let (keys, values) = source.all_bf16().expect("bfloat16");
        let (Some(tmul), false) = (&mut self.tmul, tokens.is_empty()) else { return };
        tmul.pack(keys, values, &tokens);
        // Weight 0 times a NaN is NaN: then values that a query does not see become 0, query by query.
        let finite = |&token: &u32| all_finite(values.row(token as usize));
        if !partly.is_empty() && !tokens.iter().all(finite) {
            for query in partly.chunks(1) {
                self.hide_values(values, &tokens, |row| reader(range, chosen, numbers)(query[0] as usize, row));
                self.attend_some(range, chosen, (numbers, names), query, true, state);
            }
            self.tmul.as_mut().expect("tiles").pack_values(values, &tokens);
        } else {
            partly.chunks(QUERIES).for_each(|listed| self.attend_some(range, chosen, (numbers, names), listed, true, state));
        }
        wholly.chunks(QUERIES).for_each(|listed| self.attend_some(range, chosen, (numbers, names), listed, false, state));
    }

    /// Packs the values of these tokens with zeros in place of those that a query does not see, whose biases `read` writes.
    fn hide_values(&mut self, values: Matrix<'_, bf16>, tokens: &[u32], read: impl FnOnce(&mut [T])) {
        let mut bias = vec![T::ZERO; tokens.len()];
        read(&mut bias);
        let mut seen = vec![bf16::ZERO; tokens.len() * values.cols];
        for ((row, &token), &bias) in seen.chunks_exact_mut(values.cols.max(1)).zip(tokens).zip(&bias) {
            if bias != T::NEG_INFINITY {
                row.copy_from_slice(values.row(token as usize));
            }
        }
        let numbers: Vec<u32> = (0u32..).take(tokens.len()).collect();
        let seen = Matrix::new(&seen, tokens.len(), values.cols, values.cols);
        self.tmul.as_mut().expect("tiles").pack_values(seen, &numbers);
    }

    /// A step for a few queries over the packed keys.
    fn attend_some(
        &mut self,
        range: &RangeOfHead<'_, T>,
        chosen: &Chosen<'_>,
        (numbers, names): (&Range<usize>, &[u32]),
        listed: &[u32],
        partly: bool,
        state: &mut State<T>,
    ) {
        let tmul = self.tmul.as_mut().expect("tiles");
        let given = Some(tmul.multiply(range.queries.bf16.expect("bfloat16"), listed));
        // They are packed; here only their number counts.
        let none = Matrix::new(&[], numbers.len(), 0, 0);
        let at = Keys { keys: none, values: none, stream: Stream::Exact, names, ahead: None };
        if chosen.viewer.is_biased() || (partly && !chosen.viewer.is_window()) {
            self.tile.attend_biased(range, &at, listed, given, reader(range, chosen, numbers), state);
        } else if partly {
            let seen: Vec<[u32; 2]> = listed.iter().map(|&query| ends(&chosen.sights[query as usize], numbers)).collect();
            self.tile.attend(range, &at, listed, Visible::Ranges(&seen), given, state);
        } else {
            self.tile.attend(range, &at, listed, Visible::All, given, state);
        }
        let (weights, rescale) = self.tile.weights().expect("weights for tiles");
        tmul.add_values(listed, weights, rescale, state);
    }
}
