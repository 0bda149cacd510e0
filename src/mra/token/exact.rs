//! The exact blocks of a range of queries: block by block, the queries that compute it together.

use std::ops::Range;

use super::coarse::State;
use super::key_block::{KeyBlock, Keys, RangeOfHead};
use super::queries_of_block::QueriesOfBlocks;
use super::tmul_keys::{QUERIES, TmulKeys};
use super::visible_keys::Viewer;
use crate::kernels::{AllFinite, Stream, Visible};
use crate::mra::attend::{KeyBatch, KeySource};
use crate::mra::problem::{Problem, Sight};
use crate::simd::{Element, Level, Scalar};

/// What the queries of a range see, and which of them compute which blocks.
pub(crate) struct Chosen<'a> {
    pub(crate) sights: &'a [Sight<'a>],
    pub(crate) viewer: Viewer<'a>,
    pub(crate) lists: &'a QueriesOfBlocks,
}

/// The buffers of a block and the queries that compute it.
pub(crate) struct ExactBlock<T> {
    level: Level,
    pub(super) tile: KeyBlock<T>,
    /// The products, where they are those of tiles.
    pub(super) tmul: Option<TmulKeys<T>>,
    dropping: bool,
    names: Vec<u32>,
}

impl<T: Scalar> ExactBlock<T> {
    /// Buffers for blocks of this problem, of tensors of `E`.
    pub(crate) fn new<E: Element<Compute = T>>(problem: &Problem<'_>, value_dim: usize) -> Self {
        let masked = problem.has_alibi() || problem.segments.iter().any(|segment| segment.kinds.is_some());
        let (tile, tmul) = (KeyBlock::new(problem, problem.block_size, masked), TmulKeys::new::<E>(problem, value_dim));
        Self {
            level: problem.level,
            tile: if tmul.is_some() { tile.keeping_weights(QUERIES) } else { tile },
            tmul,
            dropping: problem.dropout.is_some(),
            names: Vec::new(),
        }
    }

    /// Continues the softmax of the queries of a range over all of their exact blocks, in ascending order.
    pub(crate) fn attend<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, T>,
        chosen: &Chosen<'_>,
        source: &KeySource<'_, E>,
        keys: &mut KeyBatch<T>,
        state: &mut State<T>,
    ) {
        let present = chosen.lists.present();
        let mut names = std::mem::take(&mut self.names);
        for (index, &block) in present.iter().enumerate() {
            let numbers = source.numbers(block);
            names.clear();
            names.extend(numbers.clone().filter(|_| self.dropping).map(|number| dropout_key(source, number)));
            if self.tmul.is_some() {
                self.attend_on_tiles(range, chosen, source, (&numbers, &names), chosen.lists.of(index), state);
                continue;
            }
            keys.clear();
            assert!(keys.push(source, numbers.clone()), "an empty batch has room for a block");
            let Some(part) = keys.parts(source).next() else { continue };
            self.tile.pack(&part.keys, range.queries);
            let [partly, wholly] = chosen.lists.of(index);
            let at = Keys { keys: part.keys, values: part.values, stream: Stream::Exact, names: &names, ahead: None };
            self.attend_partly(range, chosen, &at, &numbers, partly, state);
            let at = Keys { ahead: present.get(index + 1).and_then(|&next| source.block_ahead(next)), ..at };
            if chosen.viewer.is_biased() {
                self.tile.attend_biased(range, &at, wholly, None, reader(range, chosen, &numbers), state);
            } else {
                self.tile.attend(range, &at, wholly, Visible::All, None, state);
            }
        }
        self.names = names;
    }

    /// A step for queries that do not see all keys.
    fn attend_partly(
        &mut self,
        range: &RangeOfHead<'_, T>,
        chosen: &Chosen<'_>,
        at: &Keys<'_, T>,
        numbers: &Range<usize>,
        listed: &[u32],
        state: &mut State<T>,
    ) {
        if listed.is_empty() {
            return;
        }
        let read = reader(range, chosen, numbers);
        if !T::run(self.level, AllFinite(at.values)) {
            self.tile.attend_one_by_one(range, at, listed, read, state);
        } else if chosen.viewer.is_window() {
            let seen: Vec<[u32; 2]> = listed.iter().map(|&query| ends(&chosen.sights[query as usize], numbers)).collect();
            self.tile.attend(range, at, listed, Visible::Ranges(&seen), None, state);
        } else {
            self.tile.attend_biased(range, at, listed, None, read, state);
        }
    }
}

/// Writes what is added to the logits of a query on the keys of a block.
pub(super) fn reader<'r, T: Scalar>(
    range: &'r RangeOfHead<'_, T>,
    chosen: &'r Chosen<'_>,
    numbers: &'r Range<usize>,
) -> impl Fn(usize, &mut [T]) + use<'r, T> {
    move |query, row| chosen.viewer.read_row(range.tokens.start + query, &chosen.sights[query], numbers, row)
}

/// What dropout calls a key: the low 32 bits of its place in the sequence.
pub(crate) fn dropout_key<E: Element>(source: &KeySource<'_, E>, number: usize) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "the low 32 bits count")]
    {
        (source.token(number) - source.first_token()) as u32
    }
}

/// The keys of a block that the window leaves to a query, counted from its first one.
pub(super) fn ends(sight: &Sight<'_>, numbers: &Range<usize>) -> [u32; 2] {
    let range = Viewer::range(sight, numbers);
    [range.start, range.end].map(|key| u32::try_from(key).expect("keys of a block"))
}
