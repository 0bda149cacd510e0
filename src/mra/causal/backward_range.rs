//! Backward of a range of queries: against pooled blocks tile by tile, then against exact blocks one after the other.

use std::ops::Range;

use super::backward::Pass;
use super::coarse::{STRIP_BLOCKS, blank, exclude, matrix, split};
use super::forward::RANGE_QUERIES;
use super::gradient::{GradientTile, RangeRows};
use super::lists::BlockLists;
use super::meeting::{Meeting, for_meetings};
use super::problem::Sight;
use crate::kernels::{AllFinite, Matrix, Stream};
use crate::mra::coarse::{for_strips, weigh};
use crate::mra::gradient_tile::KeySums;
use crate::mra::scratch::Buffer;
use crate::mra::strip::{KeySource, Strip};
use crate::mra::tile::TILE_QUERIES;
use crate::simd::{Element, Scalar};

/// A range of queries of a head, with what they see and what they have chosen.
pub(crate) struct QueryRange<'a> {
    /// Heads of all batch items are numbered through.
    pub(crate) head: usize,
    pub(crate) tokens: Range<usize>,
    pub(crate) sights: &'a [Sight],
    pub(crate) plan: &'a [i32],
}

/// What a thread reuses.
pub(crate) struct Scratch<T> {
    pub(crate) tile: GradientTile<T>,
    pub(crate) rows: RangeRows<T>,
    pub(crate) strip: Strip<T>,
    pub(crate) lists: BlockLists,
    pub(crate) sights: Vec<Sight>,
    /// The numbers of the queries of a range.
    pub(crate) numbers: Vec<u32>,
    /// The gradient of the queries of a range: a row of whole vectors for each.
    pub(crate) dq: Buffer<T>,
}

/// Sums of the gradients of all tokens of a group, and of all its pooled ones.
pub(crate) struct GroupSums<'a, T> {
    pub(crate) exact: KeySums<'a, T>,
    pub(crate) pooled: KeySums<'a, T>,
}

impl<E: Element> Pass<'_, '_, E> {
    pub(crate) fn scratch(&self) -> Scratch<E::Compute> {
        let (inner, (key_width, value_width)) = (&self.problem.inner, self.widths());
        let queries = inner.query_len.min(RANGE_QUERIES);
        Scratch {
            tile: GradientTile::new(self.problem, queries, STRIP_BLOCKS.max(inner.block_size), self.value_dim),
            rows: RangeRows::new(queries, key_width, value_width),
            strip: Strip::new(inner, inner.head_dim, self.value_dim),
            lists: BlockLists::default(),
            sights: Vec::with_capacity(queries),
            numbers: (0..u32::try_from(queries).expect("a size of a range")).collect(),
            dq: Buffer::scratch(queries * key_width),
        }
    }

    pub(crate) fn query_range<'s>(&'s self, head: usize, tokens: Range<usize>, sights: &'s mut Vec<Sight>) -> QueryRange<'s> {
        let inner = &self.problem.inner;
        sights.clear();
        sights.extend(tokens.clone().map(|token| self.problem.sight(head / inner.heads, token)));
        let plan = &self.plan[(head * inner.query_len + tokens.start) * self.width..][..tokens.len() * self.width];
        QueryRange { head, tokens, sights, plan }
    }

    /// A range of queries: dq, and the sums for keys and values if wanted.
    ///
    /// # Safety
    /// - Nothing else holds the rows of these queries in the gradient of the queries.
    pub(crate) unsafe fn range(
        &self,
        head: usize,
        tokens: Range<usize>,
        scratch: &mut Scratch<E::Compute>,
        mut sums: Option<&mut GroupSums<'_, E::Compute>>,
    ) {
        let inner = &self.problem.inner;
        let Scratch { tile, rows, strip, lists, sights, numbers, dq } = scratch;
        let range = self.query_range(head, tokens, sights);
        self.fill(&range, &numbers[..range.tokens.len()], rows);
        let key_width = self.widths().0;
        dq[..range.tokens.len() * key_width].fill(E::Compute::ZERO);
        let pooled = sums.as_mut().map(|sums| &mut sums.pooled);
        self.coarse(&range, rows, numbers, &(0..inner.key_blocks()), tile, pooled, Some(dq));
        lists.build(range.blocks(), range.sights, range.plan, self.width);
        let source = self.source(inner.kv_row(head));
        for &block in lists.present() {
            let sums = sums.as_mut().map(|sums| &mut sums.exact);
            self.exact(&range, rows, lists, block, &source, tile, strip, sums, Some(dq));
        }
        for (query, token) in range.tokens.clone().enumerate() {
            // SAFETY: the caller's.
            let to = unsafe { self.gradients.query.row_mut(head / inner.heads, head % inner.heads, token) };
            E::narrow(&dq[query * key_width..][..to.len()], to);
        }
    }

    /// Copies the rows of some queries of a range.
    pub(crate) fn fill(&self, range: &QueryRange<'_>, numbers: &[u32], rows: &mut RangeRows<E::Compute>) {
        let (heads, head) = (self.problem.inner.heads, range.head);
        let (query, grad) =
            (self.inputs.query.head(head / heads, head % heads), self.grad_out.head(head / heads, head % heads));
        let terms = &self.terms[head * self.problem.inner.query_len..][range.tokens.clone()];
        rows.fill(range.tokens.len(), numbers, |number| {
            let token = range.tokens.start + number;
            (query.row(token), grad.row(token), terms[number])
        });
    }

    /// What some pooled keys and values contribute. `numbers` are those of the queries of the range.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, the buffers, and what is wanted")]
    pub(crate) fn coarse(
        &self,
        range: &QueryRange<'_>,
        rows: &RangeRows<E::Compute>,
        numbers: &[u32],
        blocks: &Range<usize>,
        tile: &mut GradientTile<E::Compute>,
        mut sums: Option<&mut KeySums<'_, E::Compute>>,
        mut dq: Option<&mut Buffer<E::Compute>>,
    ) {
        let (inner, Some(means)) = (&self.problem.inner, &self.means) else { return };
        let (kv, batch) = (inner.kv_row(range.head), range.head / inner.heads);
        let (keys, Some(values)) = (means.keys(inner, kv), means.values(inner, kv)) else { return };
        let finite = |blocks: Range<usize>| {
            let finite = |means| E::Compute::run(inner.level, AllFinite(means));
            finite(matrix(&keys, blocks.clone())) && finite(matrix(&values, blocks))
        };
        for tokens in self.problem.cut(batch, range.tokens.clone(), TILE_QUERIES) {
            let mut rest = tokens.start - range.tokens.start..tokens.end - range.tokens.start;
            while !rest.is_empty() {
                let sights = &range.sights[rest.clone()];
                let past = sights[sights.len() - 1].past;
                // Gradient 0 times a mean that is no number is no number: queries only go together with blocks that all see.
                let count = match split(sights) {
                    Some(split) if !finite(sights[0].past..past) => split,
                    _ => sights.len(),
                };
                let queries = rest.start..rest.start + count;
                rest.start = queries.end;
                let sights = &range.sights[queries.clone()];
                let plan = &range.plan[queries.start * self.width..queries.end * self.width];
                let visible = blocks.start..blocks.end.min(sights[count - 1].past);
                if visible.is_empty() {
                    continue;
                }
                let numbers = &numbers[queries];
                tile.start(rows, numbers, Stream::Coarse, (range.head, range.tokens.start));
                for_strips(visible.len(), STRIP_BLOCKS, |part| {
                    let part = visible.start + part.start..visible.start + part.end;
                    let (keys, values) = (matrix(&keys, part.clone()), matrix(&values, part.clone()));
                    tile.add(
                        rows,
                        numbers,
                        keys,
                        values,
                        part.start,
                        sums.as_deref_mut(),
                        dq.as_deref_mut(),
                        |logits, columns| {
                            weigh(logits, columns, inner.keys(batch), part.clone());
                            blank(logits, columns, sights, part.clone());
                            exclude(logits, columns, sights, plan, self.width, part);
                        },
                    );
                });
            }
        }
    }

    /// What a block of keys and values contributes to the queries that have it in their plan, and they to it.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, the buffers, and what is wanted")]
    pub(crate) fn exact(
        &self,
        range: &QueryRange<'_>,
        rows: &RangeRows<E::Compute>,
        lists: &BlockLists,
        block: usize,
        source: &KeySource<'_, E>,
        tile: &mut GradientTile<E::Compute>,
        strip: &mut Strip<E::Compute>,
        mut sums: Option<&mut KeySums<'_, E::Compute>>,
        mut dq: Option<&mut Buffer<E::Compute>>,
    ) {
        let (level, sights) = (self.problem.inner.level, range.sights);
        let numbers = source.numbers(block);
        // No key behind the last query that meets the block is read.
        let last = lists.of(block).last().map_or(0, |&query| sights[query as usize].keys);
        strip.clear();
        assert!(strip.push(source, numbers.start..numbers.end.min(last)), "an empty strip has room for a block");
        let Some(part) = strip.parts(source).next() else { return };
        for_meetings(lists, block, sights, numbers.start, numbers.len(), |meeting| {
            let mut meet = |meeting: &Meeting<'_>| {
                let (keys, values) = (part.keys.row_range(0..meeting.keys), part.values.row_range(0..meeting.keys));
                GradientTile::prefetch(rows, dq.as_deref(), meeting.next);
                tile.start(rows, meeting.queries, Stream::Exact, (range.head, range.tokens.start));
                let (sums, dq) = (sums.as_deref_mut(), dq.as_deref_mut());
                tile.add(rows, meeting.queries, keys, values, numbers.start, sums, dq, |logits, columns| {
                    meeting.hide(logits, columns, sights, numbers.start);
                });
            };
            let finite = |matrix: Matrix<'_, E::Compute>| {
                E::Compute::run(level, AllFinite(matrix.row_range(meeting.hidden_from_some(sights, numbers.start))))
            };
            if !meeting.partly || (finite(part.keys) && finite(part.values)) {
                meet(&meeting);
            } else {
                // Gradient 0 times a key that is no number is no number.
                meeting.one_by_one(sights, numbers.start, |alone| meet(&alone));
            }
        });
    }
}

impl QueryRange<'_> {
    /// Blocks of which some query of the range sees anything: `0..blocks`.
    pub(crate) fn blocks(&self) -> usize {
        self.sights.last().map_or(0, |sight| sight.blocks)
    }
}
