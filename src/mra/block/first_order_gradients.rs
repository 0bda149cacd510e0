//! The gradients of coarse blocks to first order where there are few heads for the threads: by rows, and by columns.

use std::ops::Range;

use super::first_order_backward::{FirstOrderPass, RowSums};
use super::summaries::{ROWS, Summaries};
use crate::exec::{Buffer, Chunks, threads};
use crate::mra::attend::KeySums;
use crate::mra::problem::{Batch, Problem};
use crate::simd::{Element, Scalar};

/// Gradients of queries, keys and values by number, in rows of whole vectors, and of the means of queries.
pub(super) struct FirstOrderGradients<T> {
    dq: Buffer<T>,
    means: Buffer<T>,
    dk: Buffer<T>,
    dv: Buffer<T>,
    block_size: usize,
    key_width: usize,
    value_width: usize,
}

impl<T: Scalar> FirstOrderGradients<T> {
    fn new(problem: &Problem<'_>, batch: &Batch<'_>, value_dim: usize) -> Self {
        let (block_size, key_width) = (problem.block_size, problem.padded::<T>(problem.head_dim));
        let value_width = problem.padded::<T>(value_dim);
        Self {
            dq: Buffer::zeros(batch.rows() * block_size * key_width),
            means: Buffer::zeros(batch.rows() * key_width),
            dk: Buffer::zeros(batch.columns() * block_size * key_width),
            dv: Buffer::zeros(batch.columns() * block_size * value_width),
            block_size,
            key_width,
            value_width,
        }
    }

    /// Of queries of a flat head, by their numbers.
    pub(super) fn dq(&self, batch: &Batch<'_>, head: usize, numbers: Range<usize>) -> &[T] {
        let first = batch.row(head, 0) * self.block_size;
        &self.dq[(first + numbers.start) * self.key_width..(first + numbers.end) * self.key_width]
    }

    /// Of the mean query of a row.
    pub(super) fn mean(&self, batch: &Batch<'_>, head: usize, i: usize) -> &[T] {
        &self.means[batch.row(head, i) * self.key_width..][..self.key_width]
    }

    /// Of keys of a group, and of their values, by their numbers.
    pub(super) fn keys(&self, batch: &Batch<'_>, group: usize, numbers: Range<usize>) -> (&[T], &[T]) {
        let first = batch.column(group, 0) * self.block_size;
        let (start, end) = (first + numbers.start, first + numbers.end);
        (&self.dk[start * self.key_width..end * self.key_width], &self.dv[start * self.value_width..end * self.value_width])
    }
}

/// The memory of [`FirstOrderGradients`], of which each task writes its own part.
struct Outputs<'a, T> {
    dq: Chunks<'a, T>,
    means: Chunks<'a, T>,
    dk: Chunks<'a, T>,
    dv: Chunks<'a, T>,
}

impl<E: Element> FirstOrderPass<'_, '_, E> {
    /// All gradients, by rows and by columns.
    pub(super) fn gradients(&self, threads: usize) -> FirstOrderGradients<E::Compute> {
        let mut gradients = FirstOrderGradients::new(self.problem, self.batch, self.value_dim);
        let FirstOrderGradients { dq, means, dk, dv, .. } = &mut gradients;
        let [dq, means, dk, dv] = [dq, means, dk, dv].map(|buffer| Chunks::new(buffer, 1));
        let to = Outputs { dq, means, dk, dv };
        self.by_rows(threads, &to);
        self.by_columns(threads, &to);
        gradients
    }

    /// One task for a few rows: dq.
    fn by_rows(&self, threads: usize, to: &Outputs<'_, E::Compute>) {
        let tasks: Vec<(usize, Range<usize>)> = (0..self.batch.flat_heads())
            .flat_map(|head| self.batch.segment(head).row_tiles(ROWS).map(move |rows| (head, rows)))
            .collect();
        threads::for_each(
            threads,
            tasks.len(),
            || self.scratch(),
            |scratch, task| {
                let (head, rows) = tasks[task].clone();
                // SAFETY: each task has its own rows.
                let mut of_rows = unsafe { self.row_sums(to, head, &rows) };
                self.rows(head, rows, 0..self.batch.segment(head).keys.len(), scratch, Some(&mut of_rows), None);
            },
        );
    }

    /// One task for a few blocks of keys: dk and dv.
    fn by_columns(&self, threads: usize, to: &Outputs<'_, E::Compute>) {
        let size = Summaries::<E::Compute>::new(self.problem, self.batch, self.value_dim).capacity;
        let tasks: Vec<(usize, Range<usize>)> = (0..self.batch.groups())
            .flat_map(|group| {
                let count = self.batch.segment_of_group(group).keys.len();
                (0..count).step_by(size).map(move |first| (group, first..(first + size).min(count)))
            })
            .collect();
        threads::for_each(
            threads,
            tasks.len(),
            || self.scratch(),
            |scratch, task| {
                let (group, blocks) = tasks[task].clone();
                let keys = &self.batch.segment_of_group(group).keys;
                let numbers = keys.start(blocks.start)..keys.start(blocks.end);
                // SAFETY: each task has its own blocks of keys.
                let mut sums = unsafe { self.key_sums(to, group, numbers) };
                for head in self.batch.heads_of(group) {
                    for rows in self.batch.segment(head).row_tiles(ROWS) {
                        self.rows(head, rows, blocks.clone(), scratch, None, Some(&mut sums));
                    }
                }
            },
        );
    }

    /// # Safety
    /// - Nothing else holds the gradients of these keys.
    unsafe fn key_sums<'t>(
        &self,
        to: &'t Outputs<'_, E::Compute>,
        group: usize,
        numbers: Range<usize>,
    ) -> KeySums<'t, E::Compute> {
        let first = self.batch.column(group, 0) * self.problem.block_size;
        let of = |channels: usize| {
            let width = self.problem.padded::<E::Compute>(channels);
            (first + numbers.start) * width..(first + numbers.end) * width
        };
        // SAFETY: the caller's.
        unsafe {
            KeySums {
                dk: to.dk.range_mut(of(self.problem.head_dim)),
                dv: to.dv.range_mut(of(self.value_dim)),
                first: numbers.start,
            }
        }
    }

    /// # Safety
    /// - Nothing else holds the gradients of these rows.
    unsafe fn row_sums<'t>(
        &self,
        to: &'t Outputs<'_, E::Compute>,
        head: usize,
        rows: &Range<usize>,
    ) -> RowSums<'t, E::Compute> {
        let width = self.problem.padded::<E::Compute>(self.problem.head_dim);
        let (of_rows, first) = (&self.batch.segment(head).rows, self.batch.row(head, 0));
        let number = |i: usize| first * self.problem.block_size + of_rows.start(i);
        // SAFETY: the caller's.
        unsafe {
            RowSums {
                dq: to.dq.range_mut(number(rows.start) * width..number(rows.end) * width),
                means: to.means.range_mut((first + rows.start) * width..(first + rows.end) * width),
            }
        }
    }
}
