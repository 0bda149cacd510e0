//! Means of larger blocks from those of smaller ones.

use super::{Pooled, Side};
use crate::exec::{Buffer, Chunks, threads};
use crate::mra::problem::{Batch, Problem};
use crate::simd::Scalar;

impl<T: Scalar> Pooled<T> {
    /// The means of the blocks of the level above `level`, whose batches are given: those of their children, weighted by how many tokens
    /// each of these stands for. Sums run over the children in ascending order.
    pub(crate) fn coarsen(&self, above: &Batch<'_>, (level, batch): (&Problem<'_>, &Batch<'_>), side: Side) -> Self {
        let count = match side {
            Side::Queries => above.rows(),
            Side::Keys => above.columns(),
        };
        let mut means = Buffer::scratch(count * self.width);
        let rows = Chunks::new(&mut means, self.width);
        let children = level.children().expect("a level below another one");
        threads::for_each(
            level.threads_to_read(count * children * self.width),
            count,
            || (),
            |(), task| {
                // SAFETY: each task has its own row.
                let mean = unsafe { rows.get_mut(task) };
                mean.fill(T::ZERO);
                match side {
                    Side::Keys => {
                        let (group, column) = above.column_at(task);
                        let (segment, means) = (batch.segment_of_group(group), self.of_group(batch, group));
                        let blocks = column * children..((column + 1) * children).min(segment.keys.len());
                        average(mean, blocks.map(|j| (segment.keys.count(j), means.row(j))));
                    }
                    Side::Queries => {
                        let (head, row) = above.row_at(task);
                        let (segment, means) = (batch.segment(head), self.of_head(batch, head));
                        // Padded queries count only where there are no others.
                        let live = above.segment(head).is_live(row);
                        let blocks = level.child_rows(segment, row).map(|(_, i)| i);
                        let blocks = blocks.filter(|&i| !live || segment.is_live(i));
                        average(mean, blocks.map(|i| (segment.queries.count(i), means.row(i))));
                    }
                }
            },
        );
        Self { means, width: self.width }
    }
}

/// The mean of means of so many tokens each, which is zero to start with.
pub(super) fn average<'m, T: Scalar>(mean: &mut [T], of: impl Iterator<Item = (usize, &'m [T])>) {
    let mut total = 0;
    for (count, row) in of.filter(|&(count, _)| count > 0) {
        total += count;
        let weight = T::from_f64(count as f64);
        for (sum, &x) in mean.iter_mut().zip(row) {
            *sum += weight * x;
        }
    }
    let weight = T::from_f64(1.0 / total.max(1) as f64);
    for sum in mean {
        *sum = *sum * weight;
    }
}
