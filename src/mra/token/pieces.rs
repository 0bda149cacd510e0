//! Backward of several levels: the queries of a group of heads in a few pieces, each with sums of its own for keys and values, which are
//! added up in the order of the pieces.
//!
//! ```text
//! for each few groups:
//!     for all of their pieces at once:    dq of the ranges of the piece, and its sums        backward_range
//!     for all of them at once:            the sums of means; larger blocks share theirs among what they are made of
//!     for all of their blocks at once:    dk, dv: the sums of keys and values
//! ```
//!
//! One pass, 5 products, keeps several threads busy where there is only one group. The piece of a range follows from its place in the
//! sequence alone, so neither the number of threads nor padding nor other sequences have a say in the bits.

use std::ops::Range;

use super::backward::Pass;
use super::backward_range::GroupSums;
use super::forward::RANGE_QUERIES;
use crate::exec::{Buffer, Chunks, threads};
use crate::mra::attend::KeySums;
use crate::mra::query_terms::{KeyAndValue, finish_keys};
use crate::simd::{Element, Scalar};

/// Pieces of a group, at most. Each has sums for all keys, so they are few: with 4 of them backward at 65536 tokens took a tenth more
/// time of all threads together. Longer ranges, which more queries of a block would share, took longer, too: they leave the caches.
const PIECES: usize = 2;

/// Keys that have sums at the same time, unless more are needed to keep the threads busy: groups of short sequences are done together.
const KEYS_AT_ONCE: usize = 1 << 18;

/// Some ranges of queries of a group, and their sums.
struct Piece<T> {
    group: usize,
    /// Flat heads, and queries of each.
    ranges: Vec<(usize, Range<usize>)>,
    exact: KeyAndValue<Buffer<T>>,
    /// For the means of each level.
    pooled: Vec<KeyAndValue<Buffer<T>>>,
}

impl<E: Element> Pass<'_, '_, E> {
    /// All gradients, several groups of heads after the other.
    pub(super) fn by_pieces(&self, threads: usize) {
        let mut groups = 0..self.batch.groups();
        while !groups.is_empty() {
            let (mut pieces, mut keys, first) = (Vec::new(), 0, groups.start);
            while pieces.len() < threads || keys < KEYS_AT_ONCE {
                let Some(group) = groups.next() else { break };
                let of_group = self.pieces_of(group);
                keys += of_group.len() * self.batch.segment_of_group(group).keys.total();
                pieces.extend(of_group);
            }
            self.sum_pieces(threads, &mut pieces);
            let mut of_groups: Vec<&mut [Piece<E::Compute>]> = pieces.chunk_by_mut(|a, b| a.group == b.group).collect();
            self.sum_means(threads, &mut of_groups);
            self.finish_blocks(threads, first, &of_groups);
        }
    }

    /// The pieces of a group, whose sums are still to be made.
    fn pieces_of(&self, group: usize) -> Vec<Piece<E::Compute>> {
        let empty = || (Buffer::zeros(0), Buffer::zeros(0));
        let piece = |_| Piece { group, ranges: Vec::new(), exact: empty(), pooled: Vec::new() };
        let mut pieces: Vec<_> = (0..PIECES).map(piece).collect();
        for head in self.batch.heads_of(group) {
            let segment = self.batch.segment(head);
            for range in segment.ranges(RANGE_QUERIES) {
                pieces[segment.turn_of_range(&range, RANGE_QUERIES, PIECES)].ranges.push((head, range));
            }
        }
        // The first one may be empty, but a group has one: its blocks are finished, even if there are no queries.
        let mut place = 0..;
        pieces.retain(|piece| place.next() == Some(0) || !piece.ranges.is_empty());
        pieces
    }

    /// Computes dq of the queries of pieces, and their sums.
    fn sum_pieces(&self, threads: usize, pieces: &mut [Piece<E::Compute>]) {
        let (count, (key_width, value_width)) = (pieces.len(), self.widths());
        let zeros = |rows: usize| (Buffer::zeros(rows * key_width), Buffer::zeros(rows * value_width));
        let chunks = Chunks::new(pieces, 1);
        threads::for_each(
            threads,
            count,
            || self.scratch(),
            |scratch, task| {
                // SAFETY: each task has its own piece.
                let piece = unsafe { &mut chunks.get_mut(task)[0] };
                piece.exact = zeros(self.batch.segment_of_group(piece.group).keys.total());
                let of_level = self.levels.iter().map(|level| {
                    zeros(level.means.as_ref().map_or(0, |_| level.batch.segment_of_group(piece.group).keys.len()))
                });
                piece.pooled = of_level.collect();
                let mut sums = GroupSums {
                    exact: KeySums { dk: &mut piece.exact.0, dv: &mut piece.exact.1, first: 0 },
                    pooled: piece.pooled.iter_mut().map(|(dk, dv)| KeySums { dk, dv, first: 0 }).collect(),
                };
                for (head, range) in &piece.ranges {
                    // SAFETY: each range of queries of a head lies in one piece.
                    unsafe { self.range(*head, range.clone(), scratch, Some(&mut sums)) };
                }
            },
        );
    }

    /// Adds up the gradients of means of all pieces of each group, in the first one, and then those of every level to those of the blocks
    /// that they are means of.
    fn sum_means(&self, threads: usize, of_groups: &mut [&mut [Piece<E::Compute>]]) {
        let count = of_groups.len();
        let chunks = Chunks::new(of_groups, 1);
        threads::for_each(
            threads,
            count,
            || (),
            |(), task| {
                // SAFETY: each task has its own group.
                let pieces = unsafe { &mut chunks.get_mut(task)[0] };
                let (first, others) = pieces.split_first_mut().expect("a piece of each group");
                for other in others {
                    for (to, from) in first.pooled.iter_mut().zip(&other.pooled) {
                        add(&mut to.0, &from.0);
                        add(&mut to.1, &from.1);
                    }
                }
                self.spread(first.group, &mut first.pooled);
            },
        );
    }

    /// Adds the gradients of the means of every level to those of the blocks that they are means of.
    fn spread(&self, group: usize, pooled: &mut [KeyAndValue<Buffer<E::Compute>>]) {
        if self.levels[0].means.is_none() {
            return;
        }
        let (key_width, value_width) = self.widths();
        for (index, level) in self.levels.iter().enumerate().skip(1) {
            let (above, from) = pooled.split_at_mut(index);
            let (above, own) = (&above[index - 1], &mut from[0]);
            let children = level.problem.children().expect("a level below another one");
            let (keys, keys_above) =
                (&level.batch.segment_of_group(group).keys, &self.levels[index - 1].batch.segment_of_group(group).keys);
            for block in (0..keys.len()).filter(|&block| keys.count(block) > 0) {
                let (parent, count) = (block / children, keys.count(block));
                let share = E::Compute::from_f64(count as f64 / keys_above.count(parent) as f64);
                for (width, from, to) in [(key_width, &above.0, &mut own.0), (value_width, &above.1, &mut own.1)] {
                    let (from, to) = (&from[parent * width..][..width], &mut to[block * width..][..width]);
                    to.iter_mut().zip(from).for_each(|(to, &from)| *to += share * from);
                }
            }
        }
    }

    /// Writes dk and dv of all blocks of consecutive groups, of which `first` is the first one.
    fn finish_blocks(&self, threads: usize, first: usize, of_groups: &[&mut [Piece<E::Compute>]]) {
        let (problem, batch, (key_width, value_width)) = (self.problem, self.batch, self.widths());
        let blocks = (0..of_groups.len()).map(|place| batch.segment_of_group(first + place).keys.len()).sum();
        let first_column = batch.column(first, 0);
        let of_block = |width| Buffer::scratch(problem.block_size * width);
        threads::for_each(
            threads,
            blocks,
            || (of_block(key_width), of_block(value_width)),
            |(dk, dv), task| {
                let (group, block) = batch.column_at(first_column + task);
                let (pieces, numbers) = (&of_groups[group - first], batch.segment_of_group(group).keys.numbers(block));
                let (of_keys, of_values) = (
                    numbers.start * key_width..numbers.end * key_width,
                    numbers.start * value_width..numbers.end * value_width,
                );
                dk[..of_keys.len()].copy_from_slice(&pieces[0].exact.0[of_keys.clone()]);
                dv[..of_values.len()].copy_from_slice(&pieces[0].exact.1[of_values.clone()]);
                for piece in &pieces[1..] {
                    add(&mut dk[..of_keys.len()], &piece.exact.0[of_keys.clone()]);
                    add(&mut dv[..of_values.len()], &piece.exact.1[of_values.clone()]);
                }
                let finest = pieces[0].pooled.last().filter(|_| self.levels[0].means.is_some());
                let pooled =
                    finest.map(|(dk, dv)| (&dk[block * key_width..][..key_width], &dv[block * value_width..][..value_width]));
                let sums = KeySums { dk, dv, first: numbers.start };
                // SAFETY: each task has its own block of keys.
                unsafe { finish_keys(problem, batch, self.gradients, (group, block), &sums, pooled) };
            },
        );
    }
}

/// Adds numbers to as many sums.
fn add<T: Scalar>(sums: &mut [T], numbers: &[T]) {
    sums.iter_mut().zip(numbers).for_each(|(sum, &x)| *sum += x);
}
